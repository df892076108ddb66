"""Snapshots of torch's CUDA allocator: read safely, replayed, explained; and a predicted window written as one."""
