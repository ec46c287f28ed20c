"""How well generated video follows its conditions."""
