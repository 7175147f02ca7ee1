"""What operators are given: dashboard, alerts, image, manifests, unit."""
