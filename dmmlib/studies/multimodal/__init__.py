"""Forgetting people: MLLMU-Bench for a multimodal model, with matching among the methods.

`people` generates a benchmark in the published schema, `bench` reads and checks one, `model` is LLaVA, small or
published, `world` fine-tunes ensembles of it, `methods` unlearn, `measures` judge answers, `experiments` are the tables
of notebook 09, `figures` its pictures, `scale` what the published size would take. The packages of the extra
`multimodal` are imported when they are used.
"""
