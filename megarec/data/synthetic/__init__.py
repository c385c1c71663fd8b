"""Synthetic tasks with exact oracles (one file a kind), usable as data sources by name."""

from megarec.data.synthetic.task import Task, TaskSample, make_task

__all__ = ["Task", "TaskSample", "make_task"]
