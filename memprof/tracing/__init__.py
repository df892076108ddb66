"""What a generation did to memory, storage by storage: the ledger of lifetimes, and what CUDA kernels add to it."""
