r"""Floor 1, the mathematics: pure functions on tensors.

Merging maximises the joint likelihood of the models' posteriors. Model i's posterior is a Gaussian
with mean θᵢ and precision matrix Cᵢ; λᵢ says how much model i counts. The best θ solves

    (Σᵢ λᵢ Cᵢ) θ = Σᵢ λᵢ Cᵢ θᵢ

A *kind* is a choice of Cᵢ and one file here. For every diagonal Cᵢ the solution is the elementwise
weighted mean of `diagonal.weighted_mean`; a kind then only says what the weights are:

| kind       | Cᵢ              | weights of model i   | file          |
|------------|-----------------|----------------------|---------------|
| `identity` | the identity    | λᵢ                   | `identity.py` |
| `fisher`   | diagonal Fisher | λᵢ (Fᵢ / sᵢ + floor) | `fisher.py`   |
"""
