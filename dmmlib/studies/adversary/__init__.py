"""Malicious deletion requests: the DDPA attack and others, every unlearning method under them, and a defence.

The simplex is in `geometry`, the directions that an attack moves models along in `subspace`, the poison and what is
asked of it in `crafting`, what a service checks and scores in `service`. `world` says who holds what. For notebook 08
`experiments` prepares the attacks, `serving` runs every method under them, `sweep` asks what they depend on, `defence`
what the service sees of them, and `figures` draws.

Written from the published idea ("Flexible, Efficient, and Stable Adversarial Attacks on Machine Unlearning", ICML
2025), whose public repository holds no attack. The readings taken: displacements are measured in the Gauss-Newton
metric of models trained without the attacker; a point's pull is its gradient's coordinates in the subspace, not the
whole gradient; "dynamic" means that a request is planned for a target named after training, "delayed" that nothing is
to show before. That the loss is convex around the models, which the paper asks of the ball, was checked once by
sampled polyhedra: no violation above 5 % up to the largest radius tried; no result here rests on it.
"""
