"""One YAML file becomes one frozen, validated experiment.

``load_experiment(path, overrides)`` reads the file, lays it over the file it ``extends``, applies
``--set a.b=c`` and validates. Whatever is wrong is one ``InputError`` sentence that names the key
and the file it came from, before anything is paid for.

Settings that cannot change the loss (price, paths, how often to evaluate or save, how many
sequences fit on the card at once) are marked ``free``. All others enter ``identity``, of which a
run's id is a hash, and a resumed run refuses a change in any of them by name.

    sections.py   the sections and their limits
    kinds.py      Pretrain and Sft, how their sections must fit each other, the identity
    reading.py    files, ``extends``, ``--set``, and the sentence for what is wrong
"""

from tessera.experiment.kinds import Experiment, Pretrain, Sft, dump, parse_experiment
from tessera.experiment.reading import load_experiment
from tessera.experiment.sections import (
    NAME_PATTERN,
    Checkpoint,
    ConversationBatch,
    ConversationData,
    CorpusData,
    Cosine,
    Evaluation,
    Float8,
    LinearDecay,
    Lora,
    MicroBatch,
    Model,
    Optimizer,
    Preemption,
    Price,
    Schedule,
    Stability,
    TokenBatch,
    free,
)

__all__ = [
    "NAME_PATTERN",
    "Checkpoint",
    "ConversationBatch",
    "ConversationData",
    "CorpusData",
    "Cosine",
    "Evaluation",
    "Experiment",
    "Float8",
    "LinearDecay",
    "Lora",
    "MicroBatch",
    "Model",
    "Optimizer",
    "Preemption",
    "Pretrain",
    "Price",
    "Schedule",
    "Sft",
    "Stability",
    "TokenBatch",
    "dump",
    "free",
    "load_experiment",
    "parse_experiment",
]
