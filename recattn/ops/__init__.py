"""The operators as PyTorch knows them: schema, fake, autograd, and an implementation per device."""
