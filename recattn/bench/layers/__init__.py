"""Other libraries' layers as providers, one file per operator: with the same weights, on a padded batch as they take
it.

A layer of another function has none. torch-rechub's AUGRU and TorchEasyRec's SimpleAttention score for themselves or
have no values of their own; blocks with projections and a norm around their attention are compared as whole models, by
`recattn bench --library`.
"""
