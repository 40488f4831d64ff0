"""What happened, recorded and shown: the journal, its replay into MLflow, and the questions.

``journal`` is all that training and evaluation see of this room; it knows nothing of MLflow.
"""
