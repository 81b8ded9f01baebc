"""The process and the machine: ranks, devices, threads, signals, files."""
