"""Triton kernels. Imported only where they are launched: a machine without a GPU has no Triton."""
