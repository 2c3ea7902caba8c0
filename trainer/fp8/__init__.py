"""FP8 matrix products: `table` says which modules take part, `scaling` casts, `gemm` multiplies, `linear` and
`experts` differentiate, `convert` puts them into a model and `state` keeps what lives from step to step.

Imports no torch itself, so that the conversion table can be printed without it.
"""
