---- MODULE EndTxn ----
(* One transactional producer whose EndTxn may be delayed, repeated and arrive late.
   Code: client/transaction.py, coordinator/transaction.py. Rule: semantics of transactions V1 and V2, decisions/0001.

   PROTOCOL "v2"       the epoch rises with every transaction (KIP-890): a late EndTxn meets no open transaction of its own
            "v1"       one epoch for all transactions, as librdkafka and aiokafka have it
            "v1_safe"  V1 with our rule: a copy that went unanswered is followed by InitProducerId before the next
                       transaction begins                                                                         *)
EXTENDS Naturals
CONSTANTS PROTOCOL, Transactions, Records, Fences
VARIABLES
  n,          \* number of the client's transaction
  client,     \* "begin", "open", "ending", "init", "done"
  decision,   \* what the client asked for: TRUE commits
  cepoch,     \* the client's epoch
  sent,       \* records of this transaction that are written
  unanswered, \* a copy of EndTxn was given up and may still arrive
  epoch,      \* the coordinator's epoch
  ongoing,    \* the coordinator has an open transaction
  net,        \* copies of EndTxn on their way
  log,        \* records: transaction, number, state
  told,       \* transactions of which the caller was told "committed"
  fences      \* InitProducerId calls so far, to keep the model finite
vars == <<n, client, decision, cepoch, sent, unanswered, epoch, ongoing, net, log, told, fences>>

Init == /\ n = 1 /\ client = "begin" /\ decision = TRUE /\ cepoch = 0 /\ sent = 0 /\ unanswered = FALSE
        /\ epoch = 0 /\ ongoing = FALSE /\ net = {} /\ log = {} /\ told = {} /\ fences = 0

Write == /\ client \in {"begin", "open"} /\ sent < Records /\ cepoch = epoch
         /\ log' = log \cup {[t |-> n, i |-> sent, state |-> "open"]}
         /\ sent' = sent + 1 /\ client' = "open" /\ ongoing' = TRUE
         /\ UNCHANGED <<n, decision, cepoch, unanswered, epoch, net, told, fences>>

\* The client wants its transaction ended and sends the first copy.
End(commit) == /\ client = "open" /\ sent = Records
               /\ net' = net \cup {[e |-> cepoch, commit |-> commit]}
               /\ client' = "ending" /\ decision' = commit /\ unanswered' = FALSE
               /\ UNCHANGED <<n, cepoch, sent, epoch, ongoing, log, told, fences>>

\* No answer in time: the connection is given up, the copy may still arrive, the request is sent again elsewhere.
Repeat == /\ client = "ending" /\ ~unanswered /\ unanswered' = TRUE
          /\ net' = net \cup {[e |-> cepoch, commit |-> decision]}
          /\ UNCHANGED <<n, client, decision, cepoch, sent, epoch, ongoing, log, told, fences>>

\* The coordinator carries out a copy; another copy of the same may stay behind on a slow path.
Arrive(m, stays) == /\ m \in net /\ m.e = epoch /\ ongoing
                    /\ (stays => unanswered \/ client # "ending")
                    /\ log' = {IF r.state = "open" THEN [r EXCEPT !.state = IF m.commit THEN "committed" ELSE "aborted"]
                                                   ELSE r : r \in log}
                    /\ ongoing' = FALSE
                    /\ epoch' = IF PROTOCOL = "v2" THEN epoch + 1 ELSE epoch
                    /\ net' = IF stays THEN net ELSE net \ {m}
                    /\ UNCHANGED <<n, client, decision, cepoch, sent, unanswered, told, fences>>

\* The answer: the transaction is ended as asked (a retry of a completed one is answered like the first).
Answered == /\ client = "ending" /\ ~ongoing
            /\ told' = IF decision THEN told \cup {n} ELSE told
            /\ cepoch' = epoch
            /\ IF PROTOCOL = "v1_safe" /\ unanswered THEN client' = "init" /\ UNCHANGED <<n, sent>>
               ELSE /\ client' = IF n < Transactions THEN "begin" ELSE "done"
                    /\ n' = IF n < Transactions THEN n + 1 ELSE n
                    /\ sent' = 0
            /\ UNCHANGED <<decision, unanswered, epoch, ongoing, net, log, fences>>

\* InitProducerId: whatever is open is aborted, every earlier identity fenced.
Reinit == /\ client = "init" /\ fences < Fences /\ fences' = fences + 1
          /\ epoch' = epoch + 1 /\ cepoch' = epoch + 1 /\ ongoing' = FALSE
          /\ log' = {IF r.state = "open" THEN [r EXCEPT !.state = "aborted"] ELSE r : r \in log}
          /\ client' = IF n < Transactions THEN "begin" ELSE "done"
          /\ n' = IF n < Transactions THEN n + 1 ELSE n
          /\ sent' = 0 /\ unanswered' = FALSE
          /\ UNCHANGED <<decision, net, told>>

Next == \/ Write \/ End(TRUE) \/ End(FALSE) \/ Repeat \/ Answered \/ Reinit
        \/ \E m \in net : Arrive(m, TRUE) \/ Arrive(m, FALSE)
Spec == Init /\ [][Next]_vars

\* No transaction is committed in one part and aborted in another.
NotTorn == \A a, b \in log : (a.t = b.t /\ a.state # "open" /\ b.state # "open") => a.state = b.state
\* What the caller was told is so.
ToldIsTrue == \A t \in told : \A r \in log : r.t = t => r.state = "committed"
====
