"""What is learned: supervised multi-label classification; masked codes come beside it with the same functions.

An objective is a frozen, hashable value with `init(key, prior) -> params`, `loss(params, batch, keys) ->
(scalar, aux)`, `logits(params, batch)` and `features(params, batch)`; training and evaluation know nothing
else about it.
"""
