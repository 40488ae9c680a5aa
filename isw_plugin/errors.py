"""The exceptions of isw_plugin. Every one is also the built-in error that such a mistake usually raises.

ISWError
├── SettingError (ValueError)             a setting outside its range, or unknown
│   ├── GateParameterError                a gate parameter that the gate does not have
│   ├── PatternError                      a layer-name pattern that selects nothing
│   └── UnknownPrunerError (KeyError)     a name that PRUNERS does not have
├── NoSitesError (ValueError)             a model without a feature map that could be gated
├── ProbeError (RuntimeError)             the model could not be run on the example inputs
├── AttachError (RuntimeError)            a second pruner on one model, or none where one is needed
├── UnsupportedError (RuntimeError)       a wrapper or mode that gates cannot work under
├── NothingRecordedError (RuntimeError)   a penalty asked for before any training forward
├── RecordedWithoutGradError (RuntimeError)  a site that ran under no_grad inside a training forward
├── EngineInputError (ValueError)          a tensor that the engine's operators do not take
├── NonFiniteFeatureError (ValueError)    NaN or infinity in a feature map
├── PredictionError (ValueError)           heads that cannot be fitted, or do not fit
├── MissingExtraError (RuntimeError, ImportError)  a toolkit that is not installed
├── BudgetError (ValueError)              thresholds within the budget do not exist
└── StateMismatchError (ValueError)       a state_dict of another model, or a saved folder that is damaged
    └── NothingSavedError (FileNotFoundError)  a folder in which nothing was saved
"""

__all__ = [
    "AttachError",
    "BudgetError",
    "EngineInputError",
    "GateParameterError",
    "ISWError",
    "MissingExtraError",
    "NoSitesError",
    "NonFiniteFeatureError",
    "NothingRecordedError",
    "NothingSavedError",
    "PatternError",
    "PredictionError",
    "ProbeError",
    "RecordedWithoutGradError",
    "SettingError",
    "StateMismatchError",
    "UnknownPrunerError",
    "UnsupportedError",
]


class ISWError(Exception):
    """Whatever isw_plugin raises on purpose.

    Example:
        >>> from isw_plugin import CVGate, ISWError
        >>> try:
        ...     CVGate(beta=3.0)
        ... except ISWError as error:
        ...     print(error)
        beta=3.0: a drop threshold lies in [0, 2)
    """


class SettingError(ISWError, ValueError):
    """A setting is outside its range, or its name is unknown."""


class GateParameterError(SettingError):
    """A gate has no parameter of this name."""


class PatternError(SettingError):
    """A layer-name pattern is malformed or selects no layer of the model."""


class UnknownPrunerError(SettingError, KeyError):
    """No pruner has this name."""

    __str__ = Exception.__str__  # a KeyError's own would quote the message


class NoSitesError(ISWError, ValueError):
    """The model has no feature map that a convolution or linear layer reads."""


class ProbeError(ISWError, RuntimeError):
    """The model could not be run on the example inputs."""


class AttachError(ISWError, RuntimeError):
    """The model already has a pruner, has none, or its pruner was removed."""


class UnsupportedError(ISWError, RuntimeError):
    """The model is wrapped or run in a way that gates cannot work under."""


class NothingRecordedError(ISWError, RuntimeError):
    """The penalty was asked for, but no training forward was recorded."""


class RecordedWithoutGradError(ISWError, RuntimeError):
    """A site ran under no_grad inside a training forward, so its penalty would have no gradient."""


class EngineInputError(ISWError, ValueError):
    """A tensor of a type, shape or device that an operator of the engine does not take."""


class NonFiniteFeatureError(ISWError, ValueError):
    """A feature map holds NaN or infinity."""


class PredictionError(ISWError, ValueError):
    """Norms cannot be predicted: too few images, a gate that reads the map, or heads of another model."""


class MissingExtraError(ISWError, ModuleNotFoundError, RuntimeError):
    """A toolkit is not installed; the message names the extra that brings it."""


class BudgetError(ISWError, ValueError):
    """No thresholds meet the budget; the message says the best that was found."""


class StateMismatchError(ISWError, ValueError):
    """A state_dict belongs to another model or another version."""


class NothingSavedError(StateMismatchError, FileNotFoundError):
    """A folder holds nothing that was saved, or something else."""
