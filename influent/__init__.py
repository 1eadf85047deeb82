"""influent: which training examples made a model say that.

The pipeline, stage by stage (each talks to the next only through a directory on disk):

    index(model, data, out)     one compressed gradient per training example, by hooks, in one pass
    append(out, data)           more rows beside them, without touching those that are there
    fit(out)                    the curvature of the stored rows
    query(out, prompt=…, …)     gradients of a query, preconditioned, against every row
    self_influence(out)         outliers, wrong labels and planted rows first
    value(out, target=…)        what rows and providers are worth to a target, with intervals and payments
    mask(model, data, file)     which gradient entries to keep, learned; `select:FILE` is the compressor
    select(out, target=…)       the rows that serve a target best, as a data set
    distill(out, target=…, …)   a small model that learns to value rows as the gradients do
    appraise(student, data)     what an offer is worth, by it: no large model, no gradient
    reveal(…), audit(…)         a provider's own scores, committed to, checked on rows that it did not choose
    info(out), verify(out)      what an index holds; whether every byte is as it was written
    evaluate(out, truth=…, …)   the scores, and those of other tools, judged by what retraining does

A model of your own needs a `Task`: its loss per example. Importing this package is cheap; torch comes with first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from influent.appending import append as append
    from influent.appraising import appraise as appraise
    from influent.auditing import audit as audit
    from influent.auditing import reveal as reveal
    from influent.compress import Compress as Compress
    from influent.curvature import Damping as Damping
    from influent.distilling import distill as distill
    from influent.evaluating import evaluate as evaluate
    from influent.indexing import index as index
    from influent.masking import mask as mask
    from influent.methods import METHODS as METHODS
    from influent.methods import fit as fit
    from influent.methods import info as info
    from influent.methods import self_influence as self_influence
    from influent.methods import verify as verify
    from influent.querying import query as query
    from influent.rowstore import Index as Index
    from influent.selecting import select as select
    from influent.task import CausalLM as CausalLM
    from influent.task import Classification as Classification
    from influent.task import Task as Task
    from influent.valuing import value as value

_HOMES = {
    "methods": ("METHODS", "fit", "info", "self_influence", "verify"),
    "indexing": ("index",),
    "appending": ("append",),
    "masking": ("mask",),
    "querying": ("query",),
    "evaluating": ("evaluate",),
    "rowstore": ("Index",),
    "task": ("CausalLM", "Classification", "Task"),
    "compress": ("Compress",),
    "curvature": ("Damping",),
    "appraising": ("appraise",),
    "auditing": ("audit", "reveal"),
    "distilling": ("distill",),
    "selecting": ("select",),
    "valuing": ("value",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'influent' has no attribute {name!r}")
    return getattr(import_module(f"influent.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME_OF])
