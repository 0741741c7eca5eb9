"""Performance claims, each as ratios against a rival in the same run: `python -m benchmarks NAME`."""
