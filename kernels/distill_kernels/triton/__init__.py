"""Triton kernels and their operators. Importing one imports triton, so the ops do so when they run one."""
