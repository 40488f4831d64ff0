"""Training: sample order, loading, optimiser, schedules, checkpoints, and the one loop.

Pretraining and fine-tuning are two small programs (``pretrain``, ``sft``) on one loop (``loop``).
"""
