"""A training step whose passes over memory are fused by hand; plain torch where there is no GPU.

``Engine`` computes the loss and the gradient of a micro-batch without autograd. Every operation
here has two forms with one signature: torch, which runs anywhere and says what is meant, and a
Triton kernel that does it in one pass over memory. ``backend.use_triton`` chooses by the tensor.
"""
