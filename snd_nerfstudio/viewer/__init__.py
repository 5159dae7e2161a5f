"""What people look at: colours for features, and the model's outputs for any camera."""
