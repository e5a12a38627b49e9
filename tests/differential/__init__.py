"""The same random programs of requests to Apache Kafka 4.3.1 and to the embedded broker, answer by answer.

program    what a program is, how it is made from a seed
steps_*    the kinds of steps: how each is drawn, and how it is asked of a broker
world      what a program knows while it runs against one broker: connections, identities, names
answers    answers as plain values in which everything that may differ has a name
deliberate the differences that docs/broker.md names
compare    run one program on both, say where they part, make it smaller
"""
