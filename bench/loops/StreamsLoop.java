import com.fasterxml.jackson.databind.ObjectMapper;
import com.fasterxml.jackson.databind.ObjectReader;
import com.fasterxml.jackson.databind.ObjectWriter;
import java.io.IOException;
import java.io.UncheckedIOException;
import java.nio.file.Files;
import java.time.Duration;
import java.util.Properties;
import org.apache.kafka.common.serialization.Serdes;
import org.apache.kafka.streams.KafkaStreams;
import org.apache.kafka.streams.StreamsBuilder;
import org.apache.kafka.streams.kstream.Consumed;
import org.apache.kafka.streams.kstream.Produced;

/** Kafka Streams, one stream thread: records of Java in and out through Jackson, the key as it is. */
public class StreamsLoop {
    record Order(long id, long amount, String pad) {}

    record Seen(long id, long amount, String pad, boolean seen) {}

    static final ObjectReader READER = new ObjectMapper().readerFor(Order.class);
    static final ObjectWriter WRITER = new ObjectMapper().writerFor(Seen.class);

    static byte[] mark(byte[] value) {
        try {
            Order order = READER.readValue(value);
            return WRITER.writeValueAsBytes(new Seen(order.id(), order.amount(), order.pad(), true));
        } catch (IOException e) {
            throw new UncheckedIOException(e);
        }
    }

    public static void main(String[] args) throws Exception {
        var env = System.getenv();
        var settings = new Properties();
        settings.put("bootstrap.servers", env.get("BOOTSTRAP"));
        settings.put("application.id", env.get("GROUP"));
        settings.put("processing.guarantee", env.get("DELIVERY").equals("exactly-once") ? "exactly_once_v2" : "at_least_once");
        settings.put("commit.interval.ms", env.get("INTERVAL_MS"));
        settings.put("num.stream.threads", "1");
        settings.put("replication.factor", "1");
        settings.put("consumer.auto.offset.reset", "earliest");
        settings.put("state.dir", Files.createTempDirectory("streams").toString());
        var builder = new StreamsBuilder();
        builder.stream(env.get("SOURCE"), Consumed.with(Serdes.ByteArray(), Serdes.ByteArray()))
            .mapValues(StreamsLoop::mark)
            .to(env.get("TARGET"), Produced.with(Serdes.ByteArray(), Serdes.ByteArray()));
        var streams = new KafkaStreams(builder.build(), settings);
        Runtime.getRuntime().addShutdownHook(new Thread(() -> streams.close(Duration.ofSeconds(8))));
        streams.start();
        Thread.currentThread().join();
    }
}
