"""From an interviewed adapter to the one that answers: gate, record, registry, model class.

``records`` and ``gate`` know nothing of MLflow; ``versions`` brings its registry up to the records;
``adapter_model`` is the file that MLflow stores and runs, and nothing imports it.
"""
