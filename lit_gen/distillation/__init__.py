"""Score distillation: a frozen diffusion model teaches a generator of latents, whatever the generator is."""
