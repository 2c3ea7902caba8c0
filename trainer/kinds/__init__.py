"""The kinds of layers: one file per kind, with everything about it that needs no torch.

`base.py` defines the interface of a kind; `trainer.modelspec.ModelSpec` lists the kinds. The computation is in
`trainer.model`, in a file of the same name.
"""
