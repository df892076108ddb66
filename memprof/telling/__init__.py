"""What reports and figures say, and how they say it: facts of runs, names, colours, and who holds a peak in words."""
