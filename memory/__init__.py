"""What is measured: device readings, phases, budgets, verified offloads. Knows nothing of ComfyUI."""
