"""What the functions of a model do with its modules and weights, read from their source."""

from lora_ops.injection.source.functions import function_of, method_of
from lora_ops.injection.source.guards import outcome
from lora_ops.injection.source.reader import summarize
from lora_ops.injection.source.values import ALL, EACH, Call, Guard, Read, Summary, Use, Value

__all__ = [
    "ALL",
    "EACH",
    "Call",
    "Guard",
    "Read",
    "Summary",
    "Use",
    "Value",
    "function_of",
    "method_of",
    "outcome",
    "summarize",
]
