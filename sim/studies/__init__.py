"""What is simulated: each study builds machines into a world, disturbs them and records what they do."""
