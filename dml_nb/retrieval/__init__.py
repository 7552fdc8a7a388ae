"Retrieval: exact search, the metrics of the papers, and what is built on them."

from dml_nb.retrieval.exact_search import search
from dml_nb.retrieval.metrics import encode_labels, evaluate
from dml_nb.retrieval.query_analysis import intervals, per_class, per_query
from dml_nb.retrieval.rerank import rerank_report
from dml_nb.retrieval.sharded import search_sharded
from dml_nb.retrieval.vector_index import build_index, load_index

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
