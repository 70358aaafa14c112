"""Malicious deletion requests: the DDPA attack beside others, every method under it, and a defence.

`stable_region` and `simplex` the geometry, `subspace` the directions it lives in, `crafting` the poison, `attacks` the
requests, `service` what checks and scores them, `world` who holds what; of notebook 08 `experiments` prepares the
attacks, `serving` runs every method under them, `sweep` asks what they depend on, `defence` what the service sees of
them, `convex` has the model whose deletions are exact, and `figures` the pictures.

Written from the published idea ("Flexible, Efficient, and Stable Adversarial Attacks on Machine Unlearning", ICML
2025), whose public repository holds no attack. The readings taken: displacements are measured in the Gauss-Newton
metric of models trained without the attacker; a point's pull is its gradient's coordinates in the subspace, not the
whole gradient; "dynamic" means that a request is planned for a target named after training, "delayed" that nothing is
to show before.
"""
