"""What the columns of a run's tables mean.

A schema is documentation that travels with the data: every field carries its meaning and unit in its metadata, so
`pyarrow.parquet.read_schema(path).field("gap_norm").metadata` answers without this repository.
"""

from collections.abc import Mapping
from typing import Any, Final

import pyarrow as pa


def schema_of(*columns: tuple[str, pa.DataType, str, str]) -> pa.Schema:
    """A schema of columns (name, type, unit, meaning)."""
    return pa.schema([pa.field(name, kind, metadata={"meaning": meaning, "unit": unit}) for name, kind, unit, meaning in columns])


def table_with_schema(schema: pa.Schema, columns: Mapping[str, Any]) -> pa.Table:
    """Columns as a table of the schema: in its order, with its types and descriptions."""
    return pa.table({field.name: pa.array(columns[field.name], field.type) for field in schema}, schema=schema)


MEASURED_TABLES: Final = (
    *("documents", "draw", "effects", "effects_sequence", "estimates", "expert_weights", "progressive", "routing"),
    *("sampled_effects", "token_texts", "tokens"),
)
"""The tables of a measurement, each a parquet file of its name; all else in a run is derived from them."""
REMOVAL_ORDERS: Final = ("descending", "ascending", "random")
"""The values of the column `order` of `PROGRESSIVE`: by routing weight, highest or lowest first, or random."""

_DOCUMENT = ("document", pa.int32(), "index", "document of the corpus, counted from 0")
_POSITION = ("position", pa.int32(), "index", "token position inside the document, counted from 0")
_LAYER = ("layer", pa.int16(), "index", "transformer block, counted from 0")
_SLOT = ("slot", pa.int8(), "index", "rank of the expert among the active ones; 0 has the highest routing weight")
_EXPERT = ("expert", pa.int16(), "index", "routed expert that was removed")
_KL = (
    "kl",
    pa.float32(),
    "nats",
    "KL(intact || changed) of the prediction here: delta_loss on average over next tokens drawn from the intact model. It says "
    "how much the prediction changes, not whether it gets better; 0 where rounding puts it below; NaN if not measured",
)
_BASELINE = ("baseline_loss", pa.float32(), "nats", "-log p(next token) of the intact model; NaN at a document's end")

EFFECTS = schema_of(
    _DOCUMENT,
    _POSITION,
    _LAYER,
    _SLOT,
    _EXPERT,
    ("routing_weight", pa.float32(), "1", "weight g of the expert as applied, after renormalisation and scaling"),
    (
        "output_norm",
        pa.float32(),
        "residual stream",
        "||E(x)||, Euclidean norm of the expert's output before weighting",
    ),
    ("gap_norm", pa.float32(), "residual stream", "g ||E(x)||, how far the removal moves the block's output"),
    ("rest_cosine", pa.float32(), "1", "cosine between the removed contribution and the rest of the routed sum"),
    ("rest_norm", pa.float32(), "residual stream", "Euclidean norm of the rest of the routed sum"),
    _BASELINE,
    (
        "delta_loss",
        pa.float32(),
        "nats",
        "loss without the expert at this position minus baseline_loss; above 0 where the expert helps; NaN if not measured",
    ),
    _KL,
    (
        "first_order",
        pa.float32(),
        "nats",
        "first-order estimate of delta_loss: -g E(x) . dloss/dy, y the block's routed output here; NaN if not measured",
    ),
    (
        "first_order_curved",
        pa.float32(),
        "nats",
        "first_order plus what the change -g E(x) would do to the loss beyond its gradient if it reached the final residual "
        "stream as it is: the softmax over the 64 most likely tokens and one token for the rest; NaN if not measured",
    ),
)
ESTIMATES = pa.schema([field for field in EFFECTS if field.name not in ("delta_loss", "kl")])
"""What a budgeted run knows of every removal without making it."""
SAMPLED_EFFECTS = schema_of(
    _DOCUMENT,
    _POSITION,
    _LAYER,
    _SLOT,
    _EXPERT,
    (
        "inclusion_probability",
        pa.float64(),
        "1",
        "how likely this removal was to be drawn. The table has those drawn alone, and what costs much was drawn more often: a "
        "mean over its rows is no mean over removals, unless each row counts 1 / inclusion_probability",
    ),
    (
        "delta_loss",
        pa.float32(),
        "nats",
        "loss without the expert at this position minus the intact model's; above 0 where the expert helps",
    ),
    _KL,
)
DRAW = schema_of(
    _LAYER,
    ("expert", pa.int16(), "index", "routed expert"),
    ("n_removals", pa.int64(), "removals", "removals of the expert that could be drawn"),
    ("n_drawn", pa.int64(), "removals", "those of them that were drawn"),
    ("least_probability", pa.float64(), "1", "the smallest inclusion probability of any of them"),
    ("gap_scale", pa.float64(), "nats", "nats of size for the square of a gap norm, of the layer"),
    ("factor", pa.float64(), "1 / nats", "what a nat of size adds to a removal's probability, the same for all"),
)
EFFECTS_SEQUENCE = schema_of(
    _DOCUMENT,
    _POSITION,
    _LAYER,
    _SLOT,
    _EXPERT,
    (
        "delta_loss",
        pa.float32(),
        "nats",
        "loss here without the expert at every token of the sequence minus the intact model's loss here",
    ),
    _KL,
)
PROGRESSIVE = schema_of(
    _DOCUMENT,
    _POSITION,
    _LAYER,
    ("order", pa.string(), "name", "which experts go first: descending or ascending routing weight, or random"),
    ("removed", pa.int8(), "experts", "how many of the active experts are removed at this position, from 1"),
    ("delta_loss", pa.float32(), "nats", "loss without them at this position minus baseline_loss"),
    _KL,
    _BASELINE,
)
ROUTING = schema_of(
    _DOCUMENT,
    _LAYER,
    ("expert", pa.int16(), "index", "routed expert"),
    ("n_tokens", pa.int32(), "tokens", "tokens of the document that select the expert"),
    ("document_tokens", pa.int32(), "tokens", "all tokens of the document"),
    ("sum_probability", pa.float64(), "tokens", "router's softmax probability of the expert, summed over all tokens"),
    ("sum_entropy", pa.float64(), "nats", "entropy of the router's softmax, summed over the tokens that select the expert"),
    (
        "max_activation",
        pa.float32(),
        "residual stream",
        "largest |coordinate| of E(x) over the tokens that select the expert; NaN if there are none",
    ),
)
EXPERT_WEIGHTS = schema_of(
    _LAYER,
    ("expert", pa.int16(), "index", "routed expert"),
    ("router_row_norm", pa.float64(), "weights", "Euclidean norm of the expert's row of the router"),
    ("weight_norm", pa.float64(), "weights", "Frobenius norm of the expert's three matrices together"),
    ("mean_abs_weight", pa.float64(), "weights", "mean |w| over the expert's three matrices"),
    ("rms_weight", pa.float64(), "weights", "root mean square of w over the expert's three matrices"),
)
TOKENS = schema_of(
    _DOCUMENT,
    _POSITION,
    ("window", pa.int32(), "index", "context window that the document was cut into"),
    ("context_position", pa.int32(), "index", "position inside that window: how many tokens the model saw before"),
    ("token", pa.int32(), "token id", "input token"),
    ("target", pa.int32(), "token id", "next token of the document; -1 where there is none"),
    _BASELINE,
)
TOKEN_TEXTS = schema_of(
    _DOCUMENT,
    _POSITION,
    ("text", pa.string(), "text", "the token as text, after the one before it; U+FFFD where it is a part of a character"),
)
DOCUMENTS = schema_of(
    _DOCUMENT,
    ("id", pa.string(), "text", "stable name of the document"),
    ("domain", pa.string(), "text", "kind of text"),
    ("title", pa.string(), "text", "title for people"),
    ("n_tokens", pa.int32(), "tokens", "length of the document"),
)

_TEXT = ("text", pa.int32(), "index", "paragraph of the corpus, of those that the released rule reads, counted from 0")
COMPARISONS = schema_of(
    _LAYER,
    ("ranking", pa.string(), "text", "what ranks the active experts; routing_weight is the control, per token"),
    _TEXT,
    ("position", pa.int32(), "index", "token position inside the text, counted from 0"),
    ("high_expert", pa.int16(), "index", "active expert ranked highest"),
    ("low_expert", pa.int16(), "index", "active expert ranked lowest"),
    ("high_score", pa.float64(), "ranking", "what it was ranked by"),
    ("low_score", pa.float64(), "ranking", "what it was ranked by"),
    ("baseline_loss", pa.float64(), "nats", "-log p(next token) of the intact model"),
    ("high_delta", pa.float64(), "nats", "change of that loss without the highest expert at every token of the text"),
    ("low_delta", pa.float64(), "nats", "the same for the lowest"),
)
RELEASED_PROGRESSIVE = schema_of(
    _LAYER,
    _TEXT,
    ("position", pa.int32(), "index", "token position inside the text, counted from 0"),
    ("removed", pa.int8(), "experts", "how many are removed: those with the highest routing weights at the position"),
    ("baseline_loss", pa.float64(), "nats", "-log p(next token) of the intact model"),
    ("delta_loss", pa.float64(), "nats", "change of that loss without them at every token of the text"),
)
GRAFTS = schema_of(
    ("sweep", pa.string(), "name", "ends, suffix, prefix, single, part or layer_part: which grafts belong together"),
    ("layers", pa.string(), "text", "layers that were taken, as in 4-5; all; or none, where only outer parts were"),
    (
        "parts",
        pa.string(),
        "text",
        "parts that were taken: one, blocks (all of blocks), outer (all outside), everything, or none",
    ),
    (
        "direction",
        pa.string(),
        "name",
        "a<-b: a with parts of b; b<-a: b with parts of a; a<-other, b<-other: with parts of a new model, or of another seed",
    ),
    ("value", pa.float64(), "readout", "the readout of the graft, over all documents"),
    ("value_low", pa.float64(), "readout", "lower end of its 95% interval, bootstrap over documents; NaN for fewer than three"),
    ("value_high", pa.float64(), "readout", "upper end"),
    (
        "share",
        pa.float64(),
        "1",
        "a<-: (value - a) / (b - a), what of the difference the parts carry. b<-: (b - value) / (b - a), what is lost by them",
    ),
    ("share_low", pa.float64(), "1", "lower end of its 95% interval, all three resampled together"),
    ("share_high", pa.float64(), "1", "upper end"),
    ("n_documents", pa.int32(), "documents", "documents behind the row"),
)
COALITION_SHARES = schema_of(
    ("player", pa.string(), "name", "a layer, as in layer 3; a part; or outer: all that is outside of blocks"),
    ("shapley", pa.float64(), "1", "mean over all orders of the share that it adds when it is taken; these sum to 1"),
    ("shapley_low", pa.float64(), "1", "lower end of its 95% interval, bootstrap over documents"),
    ("shapley_high", pa.float64(), "1", "upper end"),
    ("banzhaf", pa.float64(), "1", "mean over all coalitions of the others of the share that it adds"),
    ("banzhaf_low", pa.float64(), "1", "lower end of its 95% interval"),
    ("banzhaf_high", pa.float64(), "1", "upper end"),
    ("first", pa.float64(), "1", "the share that it carries alone"),
    ("last", pa.float64(), "1", "the share that is lost without it alone"),
)
CHECKPOINTS = schema_of(
    ("checkpoint", pa.string(), "name", "revision or directory"),
    ("step", pa.int64(), "steps", "of its training"),
    ("layer", pa.string(), "text", "transformer block, counted from 0, or all"),
    ("name", pa.string(), "name", "the response, as in hooked_moe.analysis.responses"),
    ("value", pa.float64(), "response", "of this checkpoint"),
    ("low", pa.float64(), "response", "lower end of its 95% interval over documents; NaN where it has none"),
    ("high", pa.float64(), "response", "upper end"),
)
ROUTED_PARTS = schema_of(
    _DOCUMENT,
    _LAYER,
    ("n_positions", pa.int32(), "tokens", "tokens of the document that are predicted"),
    ("intact_loss", pa.float64(), "nats", "sum of -log p(next token) over them, intact model"),
    ("removed_loss", pa.float64(), "nats", "the same without any routed expert of the layer, at every token"),
)
RELEASED_EXPERTS = schema_of(
    _LAYER,
    ("expert", pa.int16(), "index", "routed expert, counted from 0"),
    ("utilization_rate", pa.float64(), "1", "as this family's released code computes it"),
    ("activation_norm", pa.float64(), "residual stream", "likewise"),
    ("mean_routing_weight_when_active", pa.float64(), "1", "likewise"),
    ("activation_std", pa.float64(), "residual stream", "likewise"),
)
RELEASED_REDISTRIBUTION = schema_of(
    _LAYER,
    ("expert", pa.int16(), "index", "routed expert, counted from 0"),
    (
        "pairing",
        pa.string(),
        "text",
        "as_released (router rows with padding, outputs without) or aligned (each token with itself)",
    ),
    ("n_rows", pa.int64(), "rows", "router rows that select the expert"),
    ("routing_weight", pa.float64(), "1", "mean router probability over them"),
    ("gap_norm", pa.float64(), "residual stream", "mean norm of the expert's contribution at the tokens paired with them"),
    ("relative_compensation", pa.float64(), "1", "mean of ||r|| max(cos(r, c), 0) / ||c||, r the block's output without c"),
)
