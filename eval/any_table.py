"""The score tables of all tasks as one type, for what takes any of them."""

from eval.composed_table import ComposedScores
from eval.composition import CompositionScores
from eval.czsl_summary import CompositionSummary
from eval.matching import MatchingScores
from eval.retrieval import BothDirections, RetrievalScores

Table = CompositionScores | CompositionSummary | MatchingScores | RetrievalScores | ComposedScores
"""What a file holds."""

Resampled = Table | BothDirections
"""What can be resampled."""
