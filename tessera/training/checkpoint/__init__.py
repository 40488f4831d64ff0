"""Checkpoints: the whole training state, saved so that it counts only when it is whole.

    the loop           a thread                        a second thread
    copy to host  ->   write to the local disk     ->  upload to the root
    memory             with digests, then rename       journal first, ``COMPLETE`` last

Two tiers: frequent ones stay on the machine's disk (``files``), permanent ones go to the root
(``publish``). A reader believes no folder without ``COMPLETE`` and no file whose digest differs; a
damaged checkpoint is passed over with a warning and the next older one is taken (``fetch``).
"""
