"""Parts that diffusion methods are made of: base models, objectives, samplers, attention, text and image conditions."""
