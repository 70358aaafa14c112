"""Unlearning where everything can be computed: ridge and multinomial logistic regression.

Throughout, S is the training set, F the forget set, R = S \\ F, and

    theta_S = A_S^-1 X_S^T y_S,    A_S = X_S^T X_S + ridge I,    delta = theta - theta_R,

so that delta is what is left to unlearn. Losses are sums over examples (half the squared error, or the cross-entropy)
plus (ridge / 2) ||theta||^2. All arrays are float64; the linear models have no intercept (add a column of ones for
one). Read `ridge` first, then `synthetic` and `iterations`; the other modules build on these.
"""
