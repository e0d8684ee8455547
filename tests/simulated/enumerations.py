"""TensorRT's enumerations, with the members of the real ones."""

__all__ = [
    "ENUMERATIONS",
    "OF_NUMPY",
    "DataType",
    "EngineStat",
    "SeekPosition",
    "Severity",
    "Strategy",
    "TensorFormat",
    "TensorIOMode",
    "TensorLocation",
]

from typing import Any

from simulated.binding import enumeration

_NAMES = ("DataType", "EngineStat", "ExecutionContextAllocationStrategy", "SeekPosition", "TensorFormat",
          "TensorIOMode", "TensorLocation")  # fmt: skip
ENUMERATIONS: dict[str, Any] = {name: enumeration(name) for name in _NAMES}
DataType = ENUMERATIONS["DataType"]
EngineStat = ENUMERATIONS["EngineStat"]
SeekPosition = ENUMERATIONS["SeekPosition"]
Strategy = ENUMERATIONS["ExecutionContextAllocationStrategy"]
TensorFormat = ENUMERATIONS["TensorFormat"]
TensorIOMode = ENUMERATIONS["TensorIOMode"]
TensorLocation = ENUMERATIONS["TensorLocation"]
Severity = enumeration("ILogger.Severity")
_BYTES = {"FLOAT": 4, "HALF": 2, "BF16": 2, "INT8": 1, "INT32": 4, "INT64": 8, "BOOL": 1, "UINT8": 1, "FP8": 1}
for _name, _size in _BYTES.items():
    DataType.__members__[_name].itemsize = _size
OF_NUMPY = {"float32": DataType.FLOAT, "float16": DataType.HALF, "int64": DataType.INT64}
"""Data types by the names that manifests use."""
