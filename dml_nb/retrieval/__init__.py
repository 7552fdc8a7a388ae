"Retrieval: exact search and the metrics of the papers."

from dml_nb.retrieval.metrics import evaluate
from dml_nb.retrieval.search import search

__all__ = ["evaluate", "search"]
