# docker build -t plainllama . && docker run --rm -it -v "$PWD/out:/plainllama/out" plainllama \
#     train.py config/tiny.py
FROM python:3.12-slim

# torch.compile needs a C++ compiler.
RUN apt-get update -qq && apt-get install -qq -y --no-install-recommends g++ && \
    rm -rf /var/lib/apt/lists/*
WORKDIR /plainllama
COPY requirements.txt requirements-demo.txt ./
RUN pip install --no-cache-dir -r requirements-demo.txt
COPY . .
ENTRYPOINT ["python"]
CMD ["train.py", "--help"]
