"""Who proposes traces, rewrites, diagnoses and repairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slmreason.runtime.face import lazily

if TYPE_CHECKING:
    from slmreason.teacher.base import Teacher
    from slmreason.teacher.dataset import TraceTeacher
    from slmreason.teacher.openai import APITeacher
    from slmreason.teacher.procedural import ProceduralTeacher
    from slmreason.teacher.prompted import LLMTeacher, TeacherError
    from slmreason.teacher.vllm import VLLMTeacher

__all__ = [
    "APITeacher",
    "LLMTeacher",
    "ProceduralTeacher",
    "Teacher",
    "TeacherError",
    "TraceTeacher",
    "VLLMTeacher",
]

__getattr__ = lazily(
    __name__,
    {
        "APITeacher": "openai",
        "LLMTeacher": "prompted",
        "ProceduralTeacher": "procedural",
        "Teacher": "base",
        "TeacherError": "prompted",
        "TraceTeacher": "dataset",
        "VLLMTeacher": "vllm",
    },
)
