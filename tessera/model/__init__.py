"""ProtoGPT, its adapters, its loss and its generation: plain torch, no input or output.

``tessera.model.shape`` is arithmetic alone and imports no torch, so that ``tessera describe`` and
the plan of a launch answer at once.
"""
