"""The bridge from DSPy: what streaming costs, what it carries, and what becomes of scenarios in which DSPy freezes."""

import asyncio
import functools
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import anyio
import dspy

from agents.current import emit_event
from agents.events import AgentEvent, Status
from agents.offline import LM
from agents.streaming import carrying, run_program, stream_events
from benchmarks.freezing import SCENARIOS, Stalls
from benchmarks.report import Row, percentile

ROUNDS = 3
RUNS, EVENTS = 200, 300
