"""How the embedded nano network was made: analytic start, training, validation and export."""
