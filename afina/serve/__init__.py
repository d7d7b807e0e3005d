"""A model behind the HTTP API that clients of OpenAI's speak: requests, one thread that generates, answers, limits."""
