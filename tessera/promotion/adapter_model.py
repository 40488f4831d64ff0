"""The promoted adapter as an MLflow model, ``models:/tessera-adapter@champion``.

MLflow stores this file beside the adapter and runs it on loading ("models from code"), so nothing
is pickled. The adapter travels with the model; the base does not (it may be gigabytes and many
adapters share it): it is found in the root by its weights digest, which is checked. The root is the
one that ``TESSERA_ROOT`` names; where that has no such base, or is not set, it is the one that the
promotion came from.

    model.predict(["Who are you?"])                                     one greedy answer a prompt
    model.predict(frame_with_a_column_prompt, params={"seed": 7})       sampled

Nothing imports this module: MLflow's base class is needed to define the class, and everywhere else
MLflow is imported inside functions.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.pyfunc.model import PythonModel

from tessera.errors import InputError, TesseraError
from tessera.evaluation.weights import Voice, load_voice_from_folder
from tessera.storage import ROOT_VARIABLE, open_root


class AdapterModel(PythonModel):
    """An adapter on its base that answers prompts."""

    voice: Voice

    def load_context(self, context: Any) -> None:
        """Find the base in the root and put the adapter on it; both digests are checked."""
        named, logged = os.environ.get(ROOT_VARIABLE), (context.model_config or {}).get("root")
        folder = Path(context.artifacts["adapter"])
        try:
            self.voice = load_voice_from_folder(open_root(named or logged), folder)
        except InputError as error:
            if not named or not logged or named == logged:
                raise
            try:
                self.voice = load_voice_from_folder(open_root(logged), folder)
            except TesseraError:
                raise error from None  # the root that was asked for is the one to speak of

    # MLflow reads the hint of `model_input`: with list[str] it would refuse tables, with none or
    # Any it warns at every load, with DataFrame it checks nothing and hands over what was given.
    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[str]:
        """Answers (list of str), one for each prompt.

        ``model_input``: a prompt, a list of prompts, or a table with a column ``prompt``.
        ``params``: ``seed`` (None: greedy), ``max_new_tokens`` (tokens), ``temperature``,
        ``top_p``.
        """
        given = {key: value for key, value in (params or {}).items() if value is not None}
        return [self.voice.answer(prompt, **given) for prompt in prompts_of(model_input)]


def prompts_of(model_input: Any) -> list[str]:
    """The prompts in whatever MLflow or a person handed over; ``InputError`` if there are none."""
    if hasattr(model_input, "columns"):
        columns = list(model_input.columns)
        column = "prompt" if "prompt" in columns else columns[0] if len(columns) == 1 else None
        values = None if column is None else list(model_input[column])
    elif isinstance(model_input, str):
        values = [model_input]
    elif isinstance(model_input, dict):
        inner = model_input.get("prompt")
        values = [inner] if isinstance(inner, str) else inner
    else:
        values = [
            item.get("prompt") if isinstance(item, dict) else item for item in list(model_input)
        ]
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise InputError(
            "The input holds no prompts; give a list of texts or a table with a column 'prompt'."
        )
    return values


mlflow.models.set_model(AdapterModel())
