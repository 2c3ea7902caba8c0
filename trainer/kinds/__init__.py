"""The kinds of layers: one file for each, with everything that is known of a kind without torch.

`base.py` says what a kind must tell; `trainer.modelspec.ModelSpec` lists the kinds. What computes them is in
`trainer.model`, in a file of the same name.
"""
