"""How long an explanation takes, where, and how far that is from what the machine allows."""

from .compare import Verdict, compare
from .measure import Case, profile, profile_cases
from .result import Profile, Row, Stage, load

__all__ = ["Case", "Profile", "Row", "Stage", "Verdict", "compare", "load", "profile", "profile_cases"]
