"""How well a generated video obeys its conditions."""
