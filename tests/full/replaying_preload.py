"""What replayers of a test need, imported once in the server that forks them."""

from __future__ import annotations

import importlib
import logging

for _name in (
    "mlflow", "mlflow.entities", "mlflow.tracking._tracking_service.utils",
    "mlflow.data.meta_dataset",
    "mlflow.store.tracking.sqlalchemy_store", "psycopg2", "sqlalchemy.dialects.postgresql.psycopg2",
    "sqlalchemy.dialects.sqlite.pysqlite", "tessera.tracking.replay",
):  # fmt: skip
    importlib.import_module(_name)
logging.disable(logging.WARNING)
