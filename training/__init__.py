"""Training of the embedded nano network: clips, metrics, analytic start, training and evaluation."""
