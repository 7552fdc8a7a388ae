"Retrieval: exact search and the metrics of the papers."

from dml_nb.retrieval.per_query import intervals, per_class, per_query
from dml_nb.retrieval.metrics import encode_labels, evaluate
from dml_nb.retrieval.rerank import rerank_report
from dml_nb.retrieval.exact_search import search
from dml_nb.retrieval.vector_index import build_index, load_index
from dml_nb.retrieval.sharded import search_sharded

__all__ = [
    "build_index",
    "encode_labels",
    "evaluate",
    "intervals",
    "load_index",
    "per_class",
    "per_query",
    "rerank_report",
    "search",
    "search_sharded",
]
